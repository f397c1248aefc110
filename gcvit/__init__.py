"""Training, evaluation and export of GC ViT image classifiers. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
