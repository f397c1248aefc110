"""Export a run for timm's hub: `python -m gcvit.export RUN`."""

from gcvit.export.timm_hub import main
from gcvit.runtime.entrypoint import run_main

if __name__ == "__main__":
    run_main(main)
