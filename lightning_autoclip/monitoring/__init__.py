"""What is told of the steps: rows for the loggers, the trace of a run, report, plot and advice."""
