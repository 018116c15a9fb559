"""For lost or damaged metadata: recover and fsck."""
