"""`python -m fastdpo`, one command a file. Each has `arguments(parser)`, and `run(args)` gives its exit status."""
