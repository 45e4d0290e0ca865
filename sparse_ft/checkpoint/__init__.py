"""The checkpoint folder: manifest, PEFT files and staged writes."""
