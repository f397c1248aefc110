"""What a training will take, before it starts: `train.py --plan`, `trainer.micro_batch_size=auto`."""
