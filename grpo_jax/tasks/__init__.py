"""Problems with their grader: data sets, generated tasks, and the toy task with its toy model."""
