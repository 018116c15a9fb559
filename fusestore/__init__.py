"""fusestore: a directory that survives the loss of a disk, a site or a cloud region."""

__version__ = "0.1.0"
