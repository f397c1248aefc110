"""Makes shards of images and checks them. It uses only gcvit's manifest and errors, and no torch."""
