"""The models that services load: weights in safetensors, a typed config in JSON, nothing pickled."""
