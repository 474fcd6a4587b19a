"""Batches of texts shared out among processes: the average of their gradients is the gradient of one process."""

import pytest
import torch
from torch import nn

from tenzoo.tasks import TextClassificationTask
from tests.data.test_shares import compare
from tests.data.text.small_texts import make, random_texts, write_tsv


class MeanOfWords(nn.Module):
    """Classes from the mean of the embeddings of all tokens that are no padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, input_ids, attention_mask, token_type_ids):
        mask = attention_mask.to(self.embedding.weight.dtype)[..., None]
        return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all")
@pytest.mark.parametrize("num_classes", [3, 1])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_texts_have_the_gradient_of_one_process(tmp_path, num_classes, world_size):
    torch.manual_seed(0)
    task = TextClassificationTask(MeanOfWords(num_classes), num_classes=num_classes)
    options = {}
    if num_classes == 1:
        columns = {"sentence": random_texts(107), "score": [0.1 + number for number in range(107)]}
        train = write_tsv(tmp_path / "numbers.tsv", columns)
        options = {"train": train, "validation": train, "label": "score"}
    # 107 texts in batches of 15: seven of them, then one of 2
    compare(task, lambda: make(tmp_path, batch_size=15, **options), world_size, 8)
