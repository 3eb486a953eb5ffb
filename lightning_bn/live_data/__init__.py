"""Whether live data is still like the data that the running statistics are of, at a known rate of false alarms."""
