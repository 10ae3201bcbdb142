from koala_lib.optim.koala import KoalaM, KoalaV

__all__ = ["KoalaM", "KoalaV"]
