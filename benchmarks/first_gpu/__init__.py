"""The first run on a GPU: what the GPU path does there that no CPU can tell. `python -m benchmarks.first_gpu`

Each section is a process of its own (`section`), so that one that crashes or hangs costs the others nothing. The native
sections need torch for CUDA, transformers, rich and psutil; vLLM, Ray and the service's other packages are imported by
the sections that use them. Models have the sizes of Qwen2.5-32B and 1.5B, and random weights.
"""
