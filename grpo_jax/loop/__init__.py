"""The frame around an experiment's loop: runs, checkpoints, collection, evaluation, pipelines of stages."""
