"""Running graphs on ONNX Runtime and comparing what comes out."""
