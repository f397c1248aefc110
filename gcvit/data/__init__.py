"""Samples on their way from shards to batches; import each module by name; this file loads nothing."""
