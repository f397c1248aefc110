"""Export a run for timm's hub: `python -m gcvit.export RUN`."""

from gcvit.errors import run_main
from gcvit.export.timm_hub import main

if __name__ == "__main__":
    run_main(main)
