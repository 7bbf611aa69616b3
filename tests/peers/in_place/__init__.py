"""What runs in the pytest of a peer: fastdpo in the place of the peer's functions. run.py loads `plugin`; a module per
peer has

    SHAPES          parameters that are a tuple of sizes, and their letters: {"shape": "NVD"}
    COMPARISONS     functions of the peer's that compare (actual, expected), as "module:name"
    patch(options)  fastdpo in place of what the peer has, with the options of its backward
    prepare(hub)    where it has one: with fastdpo and without, before anything; `hub` is a folder of ours
"""
