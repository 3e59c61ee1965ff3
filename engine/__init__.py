"""Training, evaluation, timing and the files they leave behind."""
