from selfdraft.cli import main

main()
