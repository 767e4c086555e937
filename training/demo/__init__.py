"""Show in a small world, within minutes and without a GPU, what InSPO does: ``python -m training.demo``.

``world`` is the task and its judge, ``stages`` the work from nothing to four models, ``report`` what is shown of them.
"""
