"""Handing a finished student over: a folder for diffusers alone, its model card, and ONNX."""
