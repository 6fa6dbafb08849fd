"""The embedded model's world and weights: scenes, their captions, a small CLIP trained on them.

`captions.py` says what can be seen and how it is described, `scenes.py` draws it,
`packing.py` is the layout of the weights' file, and `experiments/train_demo.py` trains them.
"""
from pathlib import Path

WEIGHTS = Path(__file__).with_name("demo.safetensors")
