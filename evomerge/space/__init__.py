"""Floor 2: the search space. numpy is the heaviest thing it may import.

The way of a search through this room: the `space:` section, the method's parameters and the models'
layers become a `Space` (`build_space`): ordered `Knob`s, and `Placement`s that say which parameter
of which parent each knob sets, in which layers and tensors. A proposer's vector is a `Genome`, a
number in [0, 1] per knob. `decode` makes it a `Recipe`; only recipes go on from there.

`check.py` holds the sentences about what is wrong with the section, `cover.py` which tensors an
entry governs, `layers.py` the layer groups. To add a scope: a field of `LayerScope`, its groups in
`layers.py`, and a case in `placement.py` if it is not made of steps. To add a kind of knob:
`knobs.py`, and its Optuna distribution in `study/storage.py`. The tests ask `config/resolve.py`
what every tensor of a small model gets, and compare that with the knob that should govern it.
"""
