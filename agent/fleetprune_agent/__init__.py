"""The agent: trains, observes, installs and serves on a device with onnxruntime alone."""
