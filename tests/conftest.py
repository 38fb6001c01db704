import torch

torch.set_num_threads(1)  # tiny models: threads would wait for each other longer than they work
