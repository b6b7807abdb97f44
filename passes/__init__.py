"""The compiler: FX passes that replace attention calls, and the ops and kernels that the rewritten graphs run.

The layers from the bottom up. A file imports only its own folder and the layers below (``tests/api/test_rooms.py``):

- ``torch_private.py``: all private torch APIs that the library uses.
- ``storage``: how a cache stores the keys and values of a layer, and the text form in which graphs carry such values.
- ``kernels``: Triton kernels and their launchers.
- ``ops``: custom ops and modules that run inside compiled graphs. They call the kernels.
- ``ir``: attention calls as values, and the reading and writing of FX graphs. All passes share it.
- ``read`` finds attention calls, ``lift`` recovers their masks, ``kv`` expands ``SparseCache`` updates, ``choose`` decides on
  masks, head groups and kernels, and ``calibration`` observes heads and mixes their outputs. They do not import each other.
- ``lower``: replaces each attention call by the kernel that runs it.
- ``pipeline.py`` has the order of the passes. ``inner_compiler.py`` hands the rewritten graph to Inductor or another compiler.
"""
