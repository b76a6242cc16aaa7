"""A federation of two small generated data sets with equal ids and different titles, two clients each."""

from __future__ import annotations

MEMBERS = ("films", "clips")
FEDERATION = [
    "data=federation",
    "data.members={films: synthetic, clips: micro_lens_shaped}",
    "data.member.films.reader.num_users=40",
    "data.member.films.reader.num_items=60",
    "data.member.films.reader.mean_length=10",
    "data.member.clips.reader.num_users=50",
    "data.member.clips.reader.num_items=80",
    "data.member.clips.partition=random",
    "partition.num_clients=2",
    "backbone.hidden_size=16",
    "backbone.num_layers=3",
    "backbone.pretrain.steps=3",
    "trainer.num_rounds=1",
    "trainer.max_local_steps=2",
    "trainer.batch_size=16",
    "trainer.cutoffs=[5,10]",
    "references.show=[random,client_popularity,markov,item_knn,pretrained]",
]
