"""The ground: command line, files, processes, meshes and the machine; no model, no decoding."""
