"""Bugs of PyTorch 2.2, Torch-TensorRT 2.2 and TensorRT 8.6 that this package goes round, each as a script that shows it.

    python -m experiments.bugs                       # all of them, each in a process of its own, into results/h200/bugs.csv
    python -m experiments.bugs.out_of_range_batch    # one of them

A script's docstring is the issue as its maintainers would want it, and ends with our way round it.  It exits with 0 where
the bug is seen, 1 where it is not, 2 where it cannot run on this machine (most need a GPU with TensorRT), 3 where the script
itself fails.  What is Torch-TensorRT's or TensorRT's fault is shown with the stock `torch_tensorrt.dynamo.compile` on
modules of a few lines.
"""
