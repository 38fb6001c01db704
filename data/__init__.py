"""Texts to translate: files, test sets, languages; `python -m data` counts them."""
