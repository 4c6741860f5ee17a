"""What ``validate``, ``bench`` and ``demo`` measure: a model's numbers and its speed.

Models run in processes of their own, so that what is measured is vLLM as a user starts it, and two sides of
a comparison share nothing: :mod:`.engine` is vLLM's ``LLM``, :mod:`.servers` are ``vllm serve`` and
llama.cpp's server. ``benchmarks/`` uses the same.
"""
