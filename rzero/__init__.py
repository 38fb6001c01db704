"""R-Zero: a Challenger invents questions for a Solver; `python -m rzero`."""
