"""What a run tells while it runs: where its time goes, rows of metrics, curves, pictures, profiles."""
