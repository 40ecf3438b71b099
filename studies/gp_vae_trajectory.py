"""What a trained GP-VAE's trajectory holds: time scales beside the prior's, and what z_t knows of the text.

    python studies/gp_vae_trajectory.py runs/gp-vae [--blocks 600] [--output FOLDER]

The probe `trajectory` (`latentlm probe trajectory`, probing/probes/trajectory.py) on blocks of the validation data of
the model's own recipe, all of the context's length, where the command takes texts.
"""

import argparse
from pathlib import Path

import torch

import latentlm
from latentlm.data.recipe import evaluation_sequences
from latentlm.probing.probes.trajectory import of_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, default=600)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = latentlm.load(options.model)
    times = model.config.max_position_embeddings
    data = evaluation_sequences(options.model, tokenizer, times, None)
    rows = [data[index]["input_ids"] for index in range(len(data))]
    blocks = torch.stack([row for row in rows if len(row) == times + 1][: options.blocks])
    result = of_blocks(model, blocks)
    print(result.about)
    for table in (result.table, *result.details.values()):
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        result.save(options.output)


if __name__ == "__main__":
    main()
