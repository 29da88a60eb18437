"Set before anything is imported: matplotlib draws to no screen"
import os
os.environ['MPLBACKEND'] = 'Agg'
