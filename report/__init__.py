"""The page that shows runs: `python -m report RUN [RUN …]`."""
