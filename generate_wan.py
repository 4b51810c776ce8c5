"""python generate_wan.py CONFIG.yml key=value ... (the same as the installed command `generate_wan`)."""

from maxdiffusion.cli import main

if __name__ == "__main__":
    main()
