"""A small world in which InSPO makes a model better within minutes, without a GPU: ``python -m training.demo``.

``world`` is the task and its judge, ``stages`` the work from nothing to four models, ``report`` what is shown of them.
"""
