"""Other libraries: exports, imports, and the adapters to transformers, scikit-learn and spaCy."""
