"""Images: a reference -> bytes -> verified upright RGB bytes.

references, placeholders   how records name pictures -> ImageRef, each in its place
store    ImageRef -> encoded bytes           folder, archives.py (zip, tar), web.py (public http)
header   what the first bytes say            format, size, orientation; refused here before decoding
pixels   decode, convert, shrink, encode     process_image for the build, decode_rgb for the loader
"""
