"""OC-VTP's network: slots that divide an image's tokens among themselves, and what it is trained with."""
