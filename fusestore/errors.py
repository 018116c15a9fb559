"""All errors of fusestore, as one tree of exceptions.

Each message is a sentence for the user: what failed, where, and the remedy.  FUSE maps
classes to errnos in one table, the command line to exit statuses in another.
"""

from __future__ import annotations


class FusestoreError(Exception):
    """The base of all errors that fusestore raises on purpose."""


class InvariantError(Exception):
    """An impossible state: a bug.  Nothing may be rebuilt or freed because of it."""


class UsageError(FusestoreError):
    """The request is invalid; nothing was changed."""


class ConfigError(FusestoreError):
    """`fusestore.toml` or a node's `node.toml` cannot be used."""


class NewerFormatError(ConfigError):
    """A file was written by a newer version."""


class StoreBusyError(FusestoreError):
    """Another process has the store open."""


class MountHeldError(FusestoreError):
    """The mount was removed, but another mount of the same file system remains."""


class FencedError(FusestoreError):
    """Another daemon has taken over the store: nothing more is written or acknowledged."""


class NotMountedError(FusestoreError):
    """No daemon serves this store or mount point."""


class UnmountedError(FusestoreError):
    """The store was unmounted while the command ran."""


class NotHealthyError(FusestoreError):
    """The command ran, and found a problem."""


# --- storage -----------------------------------------------------------------


class FormatError(FusestoreError):
    """Bytes on disk do not match the format."""


class TruncatedError(FormatError):
    """A record ends before its header or payload does."""


class BadMagicError(FormatError):
    """There is no record at the expected place."""


class UnknownVersionError(FormatError):
    """A record or store has a format that this version does not know."""


class ChecksumError(FormatError):
    """A header or payload does not match its checksum."""


class NodeError(FusestoreError):
    """A node failed a request."""


class NodeBusyError(NodeError):
    """Another process, or another store, uses the node's directory."""


class UnreadOwnerError(NodeError):
    """The record of a node's owner cannot be read, or is damaged."""


class NodeFencedError(NodeError):
    """Another mount has claimed the node's directory: this one may not write any more."""


class NodeIdentityError(NodeError):
    """The directory of a node is missing, or belongs to another node."""


class DamagedIdentityError(NodeIdentityError):
    """The file that names a node is damaged."""


class NodeOfflineError(NodeIdentityError):
    """An operator took the node offline."""


class NodeLacksError(NodeError):
    """A node does not hold the requested data; a retry would not help."""


class NodeTimeoutError(NodeError):
    """A node did not answer in time."""


class NodeReadOnlyError(NodeError):
    """A node's file system is read-only: the node can be read, but not written to."""


class InterruptedNodeError(NodeError):
    """A repair of the node was ended before it was complete: by its user, or by an unmount."""


class NodeFullError(NodeError):
    """A node has no room left."""


class MetadataError(FusestoreError):
    """The metadata database failed a request."""


class ClosedError(MetadataError):
    """The store is closed, and its metadata with it."""


class DamagedMetadataError(MetadataError):
    """The metadata database is damaged; its rows can be rebuilt from the journals."""


class ComparisonError(MetadataError):
    """There is no place to compare the metadata with the journals: nothing is known of it."""


class BadRowError(DamagedMetadataError):
    """A row of the metadata does not match its checksum."""


class ReplayError(FusestoreError):
    """The journals do not allow a mount without a loss of acknowledged data."""


# --- the file system: each of these has exactly one errno --------------------


class FileSystemError(FusestoreError):
    """The base of all errors that a system call on the mount can return."""


class NoEntryError(FileSystemError):
    """There is no such name."""


class StaleError(FileSystemError):
    """The inode no longer exists."""


class ExistsError(FileSystemError):
    """The name is taken."""


class NotDirectoryError(FileSystemError):
    """A directory was needed."""


class IsDirectoryError(FileSystemError):
    """The operation is not possible on a directory."""


class NotEmptyError(FileSystemError):
    """The directory has entries."""


class NameTooLongError(FileSystemError):
    """A name of more than 255 bytes, or a link target of more than 4095."""


class TooManyLinksError(FileSystemError):
    """The inode has the maximum number of hard links."""


class RowTooLargeError(FileSystemError):
    """A row would be too long for the metadata database."""


class FileTooLargeError(FileSystemError):
    """The offset exceeds the largest file size."""


class InvalidError(FileSystemError):
    """The argument is invalid."""


class NotPermittedError(FileSystemError):
    """No user may perform the operation on this inode."""


class NotSupportedError(FileSystemError):
    """fusestore does not support the operation."""


class NoAttributeError(FileSystemError):
    """There is no such extended attribute."""


class AttributeTooLargeError(FileSystemError):
    """The attribute, or the list of attribute names, exceeds the limit."""


class NoMemoryLeftError(FusestoreError):
    """The system refuses this process memory."""


class NoSpaceError(FileSystemError):
    """The store is full, except for its reserve."""


class ShortageError(FileSystemError):
    """A commit waits for room on nodes, or was made without shards for which they had none."""


class BacklogError(FileSystemError):
    """Too many bytes of names and attributes wait in memory for a checkpoint: try again."""


class QuotaError(FileSystemError):
    """The operation would exceed the quota of a directory."""


class CrossesQuotaError(FileSystemError):
    """A directory, or a file with several names, cannot move from one quota to another."""


class ReadOnlyError(FileSystemError):
    """The mount is read-only, by an option or after a failure."""


class LostError(FileSystemError):
    """Too many shards of a stripe are missing or bad: the bytes cannot be read now."""


class NotDurableError(FileSystemError):
    """A commit could not be made durable."""
