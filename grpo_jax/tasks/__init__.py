"""Tasks, that is problems with a grader: data sets, generated tasks, and the toy tasks with their toy model."""
