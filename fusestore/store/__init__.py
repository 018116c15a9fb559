"""An open store: all of the layers below, put together."""
