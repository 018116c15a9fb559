"""When the metadata is lost or damaged: recover and fsck."""
