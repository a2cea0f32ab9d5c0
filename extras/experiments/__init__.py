"""What measured the results of extras/RESULTS.md."""
