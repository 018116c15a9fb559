"""Everything that can go wrong, as one tree of exceptions.

The message of each is one sentence for the person who meets it: what, where,
what to do.  A face (FUSE, command line, control socket) maps a class to its
errno or exit status in one table; nobody else does.
"""

from __future__ import annotations


class FusestoreError(Exception):
    """The base of all errors that fusestore raises on purpose."""


class InvariantError(Exception):
    """Something is so that can never be: a bug.  Nothing may be built, or freed, on it."""


class UsageError(FusestoreError):
    """The caller asked for something that makes no sense; nothing was changed."""


class ConfigError(FusestoreError):
    """`fusestore.toml` or a node's `node.toml` cannot be used as it is."""


class StoreBusyError(FusestoreError):
    """Another process has the store open."""


class FencedError(FusestoreError):
    """Another daemon has taken the store over: nothing more is written or acknowledged."""


class NotMountedError(FusestoreError):
    """No daemon serves this store or mount point."""


class NotHealthyError(FusestoreError):
    """The command ran, and what it found is not as it should be."""


# --- storage -----------------------------------------------------------------


class FormatError(FusestoreError):
    """Bytes on disk are not what the format says they must be."""


class TruncatedError(FormatError):
    """A record ends before its header or payload does."""


class BadMagicError(FormatError):
    """There is no record where one was looked for."""


class UnknownVersionError(FormatError):
    """A record or store was written by a version that this one does not know."""


class ChecksumError(FormatError):
    """A header or payload does not match its checksum."""


class NodeError(FusestoreError):
    """A node could not do what it was asked to."""


class NodeBusyError(NodeError):
    """Another process, or another store, uses the node's directory."""


class NodeIdentityError(NodeError):
    """A node's directory is not there, or is not the node it should be."""


class NodeLacksError(NodeError):
    """A node does not hold what it was asked for; asking again would not help."""


class NodeTimeoutError(NodeError):
    """A node did not answer in time."""


class NodeFullError(NodeError):
    """A node has no room left."""


class MetadataError(FusestoreError):
    """The metadata database could not do what it was asked to."""


class DamagedMetadataError(MetadataError):
    """The metadata database is damaged; its rows can be made anew from the journals."""


class BadRowError(DamagedMetadataError):
    """A row of the metadata does not match its checksum."""


class ReplayError(FusestoreError):
    """The journals do not allow a mount without losing what was acknowledged."""


# --- the file system: each of these has exactly one errno --------------------


class FileSystemError(FusestoreError):
    """The base of what a system call on the mount can be answered with."""


class NoEntryError(FileSystemError):
    """There is no such name."""


class StaleError(FileSystemError):
    """There is no such inode any more."""


class ExistsError(FileSystemError):
    """The name is taken."""


class NotDirectoryError(FileSystemError):
    """A directory was needed."""


class IsDirectoryError(FileSystemError):
    """A directory cannot be used so."""


class NotEmptyError(FileSystemError):
    """The directory has entries."""


class NameTooLongError(FileSystemError):
    """A name of more than 255 bytes, or a link target of more than 4095."""


class TooManyLinksError(FileSystemError):
    """The inode has as many hard links as it may."""


class RowTooLargeError(FileSystemError):
    """A row would be longer than the metadata database takes."""


class FileTooLargeError(FileSystemError):
    """The offset is past the largest file size."""


class InvalidError(FileSystemError):
    """The argument makes no sense here."""


class NotPermittedError(FileSystemError):
    """The operation is not allowed on this inode, for anyone."""


class NotSupportedError(FileSystemError):
    """fusestore does not offer this."""


class NoAttributeError(FileSystemError):
    """There is no such extended attribute."""


class AttributeTooLargeError(FileSystemError):
    """The attribute, or the list of attribute names, is past the limit."""


class NoSpaceError(FileSystemError):
    """The store, less its reserve, is full."""


class QuotaError(FileSystemError):
    """The quota of a directory does not allow any more below it."""


class CrossesQuotaError(FileSystemError):
    """A directory, or a file with several names, cannot go from one quota to another."""


class ReadOnlyError(FileSystemError):
    """The mount is read-only, because it was asked to be or had to become so."""


class LostError(FileSystemError):
    """Too many shards of a stripe are missing or bad: the bytes cannot be had now."""


class NotDurableError(FileSystemError):
    """A commit could not be made durable."""
