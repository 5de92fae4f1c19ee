"""TensorRT engines: preparation and check of the graphs, builds for TensorRT and TensorRT-RTX, reports."""
