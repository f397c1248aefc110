"""A report of one or several runs, as one HTML file: `python -m gcvit.report RUN [RUN ...]`."""
