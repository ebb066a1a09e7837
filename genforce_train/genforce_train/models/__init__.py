"""Network architectures behind small interfaces."""
