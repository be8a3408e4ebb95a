"""The rendered world of the embedded model: scenes, training recipe, evaluation, bag making.

The recipe, in order, each resumable (``--help`` tells the options):

1. ``python -m librobot_vlm_ros.tabletop.layers`` renders the bank of layered views;
2. ``python -m librobot_vlm_ros.tabletop.train_tower`` teaches the vision tower by dense labels;
3. ``python -m librobot_vlm_ros.tabletop.train_text`` teaches the text model on ground-truth
   channels;
4. ``python -m librobot_vlm_ros.tabletop.scenes`` renders full frames;
5. ``python -m librobot_vlm_ros.tabletop.train_joint`` trains all together and writes the folder;
6. ``make evaluate`` scores it on frames of seeds it never saw.

Steps 2, 3 and 5 run on several processes under ``torchrun``.
"""
