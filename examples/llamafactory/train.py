"""LLaMA-Factory's own command line with fastdpo in its trainers.

python examples/llamafactory/train.py examples/llamafactory/dpo.yaml [key=value ...]
"""

from llamafactory.train.tuner import run_exp

import fastdpo.integrations.llamafactory

if __name__ == "__main__":
    fastdpo.integrations.llamafactory.patch()
    run_exp()  # reads the YAML file and overrides from the command line, as `llamafactory-cli train` does
