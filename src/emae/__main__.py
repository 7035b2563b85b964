from emae.cli import main

main()
